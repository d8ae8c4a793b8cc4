"""An OpenAI-compatible front of a served engine: HTTP for clients that speak OpenAI's API, gRPC towards Triton.

errors.py      what goes wrong, as OpenAI's error object with its HTTP status
protocol.py    the two request bodies, checked; what is not supported is refused, never ignored in silence
model_card.py  the served model: name, tokenizer, limits, sampling defaults; request -> GenerationRequest
answers.py     one generation, as it streams in -> reasoning, content, finish reason and exact token counts
replies.py     the response objects
app.py         routes, streaming, API key, disconnects
process.py     the front as a process beside tritonserver: `serve --openai-port`
__main__.py    what runs in that process
"""
