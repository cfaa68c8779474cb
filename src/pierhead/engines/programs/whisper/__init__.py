"""The server program of the speech engine: one Whisper model behind OpenAI's routes for sound.

It runs in the engine's own environment, by itself: nothing of Pierhead is imported.
"""
