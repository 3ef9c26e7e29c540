"""Refresh of bases that are due for it, and transport of basis-dependent state."""
