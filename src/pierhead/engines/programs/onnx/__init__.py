"""The program inside a replica that serves ONNX models; knows nothing of Pierhead.

Standalone on purpose (standard library and the wheels that ``engines.onnx`` pins): the same text runs in a sandbox and
in a container. Its modules import each other relatively, so that the folder works under any name.
"""
