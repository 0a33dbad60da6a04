"""The HTTP server of `luthier api`: OpenAI's protocol over one model. Needs fastapi and uvicorn (extra `serve`)."""
