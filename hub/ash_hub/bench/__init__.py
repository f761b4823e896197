"""`ash bench`: what a spawn and a call cost, against the same sandbox's server called directly, in one run.

A measurement is an async function that takes a `Bench` and returns rows; `measurements.MEASUREMENTS` lists them, and
a new one is added there. Times of a shared machine mean little by themselves, so rows show both sides of a ratio.
"""
