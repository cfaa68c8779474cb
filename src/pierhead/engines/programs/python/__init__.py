"""The server of Python models: a class of somebody's own behind the routes that the gateway asks; knows nothing of
Pierhead.

Standalone on purpose (standard library, FastAPI, uvicorn and what these need): it runs in the model's own environment.
"""
