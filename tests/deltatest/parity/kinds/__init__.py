"""Entries of the parity table, a module for each family of kinds; see ``deltatest.parity.registry``."""
