"""``python -m zarr_dask_stream`` is ``zds``."""

from zarr_dask_stream.cli.command import main

if __name__ == "__main__":  # worker processes import this module too
    main()
