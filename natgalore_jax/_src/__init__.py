"""Implementation. Packages import only those that are above them in tests/test_structure.py."""
