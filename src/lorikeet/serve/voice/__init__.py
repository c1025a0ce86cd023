"""Talking: when a turn begins and ends (`turn`), what happens in it (`talk`), and the WebSocket (`realtime`).

It sees the assistant and `speech`, and nothing else of the server.
"""
