#!/usr/bin/env python3
"""Run one `zds` command on a cluster of a dask-gateway, and give the cluster back when it ends.

    deploy/gateway/run.py --gateway https://gateway.example.org --workers 8 -- stats s3://bucket/array.zarr

A gateway's schedulers are reached with keys that exist for one cluster and in this process alone. The command therefore
runs in this process, on its active client, and takes no --scheduler. The exit code is the command's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from aiohttp import ClientError
from dask_gateway import Gateway
from dask_gateway.auth import BasicAuth
from dask_gateway.client import GatewayClusterError, GatewayServerError

from zarr_dask_stream.cli import main as zds


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gateway", help="address of the gateway (default: as Dask is configured)")
    parser.add_argument("--password-file", type=argparse.FileType(), help="for a gateway with simple authentication")
    parser.add_argument("--workers", type=int, default=2, help="workers to have all the time (default: 2)")
    parser.add_argument("--max-workers", type=int, default=0, help="workers while there is work (default: no more)")
    parser.add_argument("--options", type=json.loads, default={}, help="options of the gateway's clusters, as JSON")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="of zds, such as stats URL")
    return parser.parse_args(arguments)


def main() -> int:
    """Get a cluster, run the command, give the cluster back."""
    options = parse(sys.argv[1:])
    auth = BasicAuth(password=options.password_file.read().strip()) if options.password_file else None
    try:
        with Gateway(options.gateway, auth=auth) as gateway, gateway.new_cluster(**options.options) as cluster:
            cluster.adapt(minimum=options.workers, maximum=max(options.workers, options.max_workers))
            with cluster.get_client():
                sys.argv = ["zds", *options.command]
                zds()  # ends with SystemExit, its code the command's
    except (OSError, ValueError, ClientError, GatewayClusterError, GatewayServerError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
