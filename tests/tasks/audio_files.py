"""Recordings that the tests of audio make up."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float, pitch: float, rate: int = RATE) -> np.ndarray:
    """A tone that fades, with a little noise: float32 [samples]."""
    time = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(int(pitch)).normal(0, 0.02, len(time))
    return (0.5 * np.sin(2 * np.pi * pitch * time) * np.exp(-time) + noise).astype(np.float32)


def chirp(seconds: float, pitch: float) -> np.ndarray:
    """A tone that rises, with a little noise: float32 [samples]."""
    time = np.arange(int(seconds * RATE)) / RATE
    noise = np.random.default_rng(int(pitch)).normal(0, 0.02, len(time))
    return (0.5 * np.sin(2 * np.pi * pitch * time * (1 + time)) + noise).astype(np.float32)


def file_of(samples: np.ndarray, rate: int = RATE, kind: str = "WAV") -> bytes:
    """Samples as a file; WAV keeps them as floats, NaN included."""
    target = BytesIO()
    soundfile.write(target, samples, rate, format=kind, **({"subtype": "FLOAT"} if kind == "WAV" else {}))
    return target.getvalue()
