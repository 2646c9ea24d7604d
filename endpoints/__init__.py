"""Models behind an HTTP server: judges and chat backends that speak the OpenAI protocol; no SQL, no queue."""
