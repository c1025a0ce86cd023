"""The page: a Gradio app that talks to the assistant by text and by voice. It sees only the assistant and speech."""
