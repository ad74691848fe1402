"""Capture: every BatchNorm module becomes a site, every module that calls one an owner.

A *site* is one BatchNorm evaluation. An *owner* is a module whose own forward contains one; it is
traced alone, its children stay calls. Where an owner cannot be traced, or is called in another way
than the traced one, its original forward runs and the sites do their work by themselves: that is
the floor, on which no BatchNorm call escapes.
"""
