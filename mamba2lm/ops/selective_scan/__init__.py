"""Selective scan: the Mamba-1 sequence map."""
