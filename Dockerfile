# A server for one model: on a machine of yours, or as a Hugging Face Space (docs/serving.md).
#
#   docker build --build-arg MODEL=out -t my-gpt . && docker run --rm -p 7860:7860 my-gpt
#   docker run --rm -p 7860:7860 -v ./other-run:/model my-gpt        # another model with the same image
#
# MODEL: a run folder, a Hugging Face folder, or a folder with the file that the last line then names, below this one.
FROM python:3.12-slim
ARG MODEL=out

RUN useradd --create-home --uid 1000 user
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY tensorgrad tensorgrad
COPY gpt gpt
RUN pip install --no-cache-dir ".[serve,fast]"
COPY --chown=user ${MODEL} /model

USER user
WORKDIR /home/user
EXPOSE 7860
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health')"]
CMD ["gpt-serve", "--init_from", "/model", "--host", "0.0.0.0", "--port", "7860"]
