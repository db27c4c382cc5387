"""The HTTP server: any engine of core behind the OpenAI API."""
