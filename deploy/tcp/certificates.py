#!/usr/bin/env python3
"""Make the certificates with which a Dask cluster and its clients know one another.

    deploy/tcp/certificates.py FOLDER

Makes an authority for this one cluster, and with it a folder for each role: FOLDER/scheduler, FOLDER/worker and
FOLDER/client. Each has a key, a certificate, the authority's certificate and the settings of Dask that name them:
`DASK_CONFIG=FOLDER/worker dask worker tls://...` is all it takes. Where all hosts see FOLDER, `DASK_CONFIG=FOLDER`
serves every role. Needs the `openssl` command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROLES = ("scheduler", "worker", "client")

_SETTINGS = """\
distributed:
  comm:
    require-encryption: true
    tls:
      ca-file: {place}/{role}/ca.pem
"""
_ROLE = """\
      {role}:
        cert: {place}/{role}/cert.pem
        key: {place}/{role}/key.pem
"""


def openssl(*arguments: str) -> None:
    """Run one command of openssl; its complaint is the error."""
    done = subprocess.run(["openssl", *arguments], check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")


def make_key(file: Path) -> None:
    """Make a private key that its owner alone can read."""
    openssl("genpkey", "-quiet", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(file))
    file.chmod(0o600)


def make_authority(folder: Path, days: int) -> None:
    """Make the authority. Whoever has its key can let anybody in: it is not needed again unless a role is added."""
    folder.mkdir(mode=0o700)
    make_key(folder / "key.pem")
    openssl(
        *("req", "-x509", "-new", "-key", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        *("-days", str(days), "-subj", "/CN=authority of one Dask cluster"),
        *("-addext", "keyUsage=critical,keyCertSign,cRLSign"),
    )


def settings(place: Path, *roles: str) -> str:
    """Return settings of Dask for whoever plays these roles."""
    own = [_ROLE.format(place=place, role=role) for role in roles]
    return _SETTINGS.format(place=place, role=roles[0]) + "".join(own)


def make_role(role: str, folder: Path, authority: Path, days: int, place: Path) -> None:
    """Make the folder of one role: its settings name the place where the folder will lie on the hosts."""
    folder.mkdir(mode=0o700)
    make_key(folder / "key.pem")
    request, extensions = folder / "request.pem", folder / "extensions"
    openssl("req", "-new", "-key", str(folder / "key.pem"), "-out", str(request), "-subj", f"/CN=dask {role}")
    # Workers take and make connections, and so do the others: each side shows its certificate to the other.
    extensions.write_text("basicConstraints=critical,CA:false\nextendedKeyUsage=serverAuth,clientAuth\n")
    openssl(
        *("x509", "-req", "-in", str(request), "-out", str(folder / "cert.pem"), "-days", str(days)),
        *("-CA", str(authority / "cert.pem"), "-CAkey", str(authority / "key.pem"), "-extfile", str(extensions)),
        *("-CAserial", str(authority / "serial"), "-CAcreateserial"),
    )
    request.unlink()
    extensions.unlink()
    shutil.copy(authority / "cert.pem", folder / "ca.pem")
    (folder / "dask.yaml").write_text(settings(place, role))


def make_certificates(folder: Path, *, days: int = 365, place: Path | None = None) -> None:
    """Make the authority and the folders of all roles."""
    place = place or folder.resolve()
    folder.mkdir(parents=True)
    make_authority(folder / "authority", days)
    for role in ROLES:
        make_role(role, folder / role, folder / "authority", days, place)
    (folder / "dask.yaml").write_text(settings(place, *ROLES))


def main(arguments: Sequence[str]) -> int:
    """Read the command line and make what it asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to make them; must not exist yet")
    parser.add_argument("--days", type=int, default=365, help="how long they are valid (default: 365)")
    parser.add_argument("--place", type=Path, help="where the folders will lie on the hosts (default: where made)")
    options = parser.parse_args(arguments)
    if options.place is not None and not options.place.is_absolute():
        parser.error(f"--place must be an absolute path, as Dask may be started anywhere; got {options.place}")
    os.umask(0o077)
    try:
        make_certificates(options.folder, days=options.days, place=options.place)
    except FileExistsError:
        print(f"certificates.py: {options.folder} is there already, and keys are never overwritten", file=sys.stderr)
        return 2
    except FileNotFoundError:
        print("certificates.py: there is no openssl command here; install the package openssl", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"certificates.py: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
