"""Connections of callers, from their first byte to the last of each answer.

intake    heads under limits, admission, refusals
relay     what becomes of an admitted request
"""
