"""A gateway on one host, to try things out: `dask-gateway-server --config deploy/gateway/gateway_config.py`.

Clusters are processes of the user who started the gateway, with that user's rights: a gateway for many users has a
backend that keeps them apart. What every gateway needs with today's Dask are the two commands at the end.
"""

import os
import sys

c = get_config()  # noqa: F821  # the server puts it there

c.DaskGateway.backend_class = "dask_gateway_server.backends.local.UnsafeLocalBackend"
c.DaskGateway.address = os.environ.get("GATEWAY_PRIVATE", "127.0.0.1:8001")
c.Proxy.address = os.environ.get("GATEWAY_PUBLIC", "127.0.0.1:8000")

c.DaskGateway.authenticator_class = "dask_gateway_server.auth.SimpleAuthenticator"
c.SimpleAuthenticator.password = os.environ["GATEWAY_PASSWORD"]

c.ClusterConfig.worker_cores = 1
c.ClusterConfig.worker_memory = "1 G"
c.ClusterConfig.cluster_max_workers = 8
c.ClusterConfig.idle_timeout = 600

# The server still calls `dask-scheduler` and `dask-worker`, which Dask no longer has.
c.ClusterConfig.scheduler_cmd = [sys.executable, "-m", "dask", "scheduler"]
c.ClusterConfig.worker_cmd = [sys.executable, "-m", "dask", "worker"]
