"""Stream the chunks of Zarr arrays through a Dask cluster."""
