"""Stream the chunks of Zarr arrays through a Dask cluster."""

from zarr_dask_stream import errors
from zarr_dask_stream.chunks import stream_chunks
from zarr_dask_stream.dataset import stream_dataset
from zarr_dask_stream.demand import Consumer, Producer, Share
from zarr_dask_stream.engine.checkpoint import Checkpoint
from zarr_dask_stream.engine.events import Callback, DeadLetter
from zarr_dask_stream.engine.retry import RetryPolicy
from zarr_dask_stream.engine.throttle import RateLimit
from zarr_dask_stream.errors import ChunkError, ClusterError, StoreError, UsageError, ZdsError
from zarr_dask_stream.loader import Loader
from zarr_dask_stream.slices import stream_slices
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.hedging import Hedge
from zarr_dask_stream.stages import reducers
from zarr_dask_stream.stages.answers import WindowResult
from zarr_dask_stream.stages.batch import Batch
from zarr_dask_stream.stages.combine import Reducer
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.watch.dashboard import dashboard
from zarr_dask_stream.watch.metrics import Metrics
from zarr_dask_stream.watch.report import Report
from zarr_dask_stream.watch.spans import Spans
from zarr_dask_stream.write import write_chunks

__all__ = [
    "Batch",
    "Callback",
    "Checkpoint",
    "Chunk",
    "ChunkError",
    "ChunkStream",
    "ClusterError",
    "Consumer",
    "DeadLetter",
    "Hedge",
    "Loader",
    "Metrics",
    "Producer",
    "RateLimit",
    "Reducer",
    "Report",
    "RetryPolicy",
    "Share",
    "Spans",
    "StoreError",
    "UsageError",
    "WindowResult",
    "ZdsError",
    "dashboard",
    "errors",
    "reducers",
    "stream_chunks",
    "stream_dataset",
    "stream_slices",
    "write_chunks",
]
