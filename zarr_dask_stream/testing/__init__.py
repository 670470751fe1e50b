"""Stand-ins for the tests of people who use this package, and for ours: virtual time, scripted faults, slow stores.

`rehearse` iterates a stream without a cluster. `ScriptedExecutor` takes the place of a cluster and `ManualClock` that
of time, so that a run with hours of backoff and a thousand workers is over in milliseconds and goes the same way each
time. `FaultyStore` and `LatencyStore` wrap a real store; arrays in them are read by this package and by zarr alike.
"""

from zarr_dask_stream.testing.rehearsal import Rehearsal, rehearse
from zarr_dask_stream.testing.scripted import ManualClock, Outcome, ScriptedExecutor
from zarr_dask_stream.testing.stores import Fault, FaultyStore, LatencyStore

__all__ = [
    "Fault",
    "FaultyStore",
    "LatencyStore",
    "ManualClock",
    "Outcome",
    "Rehearsal",
    "ScriptedExecutor",
    "rehearse",
]
