"""The decode engine: the scheduler, tokens, sampling, stop conditions and kept KV caches.

Nothing here knows of gates or the network; models and clocks are passed in; a request's seed decides
its draws.
"""
