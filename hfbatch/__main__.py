"""Runs the command line of hfbatch with `python -m hfbatch`."""

from hfbatch.cli.app import app

if __name__ == "__main__":
    app()
