"""Servers that figures are compared with, each started from where the user installed it: no peer is a dependency.

A driver (one module a server) tells how to start it, when it is ready, how a request names an adapter, and its version.
``settings.py`` reads where the servers are; ``process.py`` starts and stops one.
"""
