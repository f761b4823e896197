"""Sandboxes on a Kubernetes cluster: one plain pod each, dialled by its address.

api.py        the API server, as JSON
documents.py  the hive's documents, as ConfigMaps and Secrets
"""
