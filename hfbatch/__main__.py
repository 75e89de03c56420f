"""`python -m hfbatch` is `hfbatch`."""

from hfbatch.cli import app

if __name__ == "__main__":
    app()
