"""Capture: every BatchNorm module becomes a site, every module that calls one an owner.

A *site* is one BatchNorm evaluation. An *owner* is a module whose own forward contains one; it is
traced alone, and its children stay calls. If an owner cannot be traced, or is called differently
from the traced call, its original forward runs and the sites work on their own. That is the floor:
no BatchNorm call escapes it.
"""
