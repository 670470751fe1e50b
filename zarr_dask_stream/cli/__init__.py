"""The command line."""

from zarr_dask_stream.cli.command import main

__all__ = ["main"]
