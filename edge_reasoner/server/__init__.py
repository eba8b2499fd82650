"""The OpenAI protocol served over any chat model: the reference cloud now, `serve` later.

Needs the extra `edge-reasoner[server]` (starlette, h11); nothing on the device's query path imports this.
"""
