"""Rewards in another process, environment or machine: the format of requests, the server, and the client.

The server's side needs torch, safetensors, Pillow, PyYAML, FastAPI and uvicorn, in whatever versions a reward's own
environment has; nothing here may import transformers or trl.
"""
