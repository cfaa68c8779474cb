"""The server programs inside replicas, ours for libraries that have none or a poor one; they know nothing of Pierhead.

Standalone on purpose (standard library and the wheels that each one's engine pins): the same text runs in a sandbox and
in a container. Modules import each other relatively, so that the folder works under any name.
"""
