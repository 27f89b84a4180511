"""Campaigns: what goes wrong in earnest, again and again, on this machine alone. `python -m campaigns.NAME` in tests/.

Each prints a table of its aims and exits 1 if one is missed. Their short forms are tests/test_campaigns.py.
"""
