"""Real parts for tests: an S3 server, a cluster of processes, an HTTP store, and a proxy that breaks things.

Every part listens on a free loopback port and ends only what it started.
"""
