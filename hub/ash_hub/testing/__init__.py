"""Suites for tests of backends.

conformance    the suite that every backend passes
document_checks  what it asks of a backend's documents
escapes        what a hostile sandbox tries
"""
