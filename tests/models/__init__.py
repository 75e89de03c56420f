"""Builders of tiny real models: random weights from a config, a tokenizer trained on the spot.

Each writes a folder as a model's author would: config.json, safetensors weights, tokenizer files. The same
arguments and seed give the same weights. Knows nothing of hfbatch.
"""
