# Triton with what the steps of `maskrcnn triton` need, which is Pillow; the models are mounted:
#   docker build -f docker/triton.Dockerfile -t maskrcnn-triton docker
#   docker run --rm --gpus all --shm-size=2g -p 8000-8002:8000-8002 -v "$PWD/models:/models:ro" maskrcnn-triton
ARG RELEASE=26.07
FROM nvcr.io/nvidia/tritonserver:${RELEASE}-py3

RUN pip install --no-cache-dir "pillow>=10.4"

EXPOSE 8000 8001 8002
USER 1000
CMD ["tritonserver", "--model-repository=/models"]
