"""Parity as a product: every kind that is served, measured the same way, in one table (``docs/parity.md``).

``python -m deltatest.parity --write docs/parity.md`` measures and writes it. A kind joins by an ``Entry`` in the tuple
``ENTRIES`` of a module in ``deltatest.parity.kinds``; modules are found by being there. ``tests/test_parity.py`` holds
the table to the kinds that ``docs/adapter-kinds.md`` calls served.
"""
