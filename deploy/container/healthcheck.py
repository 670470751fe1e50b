"""Exit with 0 when the HTTP server of this container answers: `healthcheck.py PORT PATH`."""

import sys
from http.client import HTTPConnection, HTTPException


def main(port: str, path: str) -> int:
    """Ask once."""
    connection = HTTPConnection("127.0.0.1", int(port), timeout=4)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        print(f"nothing answers at port {port}: {error}")
        return 1
    finally:
        connection.close()
    print(f"{path} answers {status}")
    return 0 if status < 400 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
