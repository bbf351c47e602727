# Stage 1 builds wheels' environment and the C++ operators, so that the running image needs no compiler.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md ./
COPY server server
COPY kernels kernels
COPY adapters_store adapters_store
COPY trainer trainer
RUN python -m venv /opt/deltaserve \
    && /opt/deltaserve/bin/pip install --no-cache-dir . \
    && XDG_CACHE_HOME=/opt/deltaserve/cache /opt/deltaserve/bin/python -m deltaserve_kernels.cpu

FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 deltaserve \
    && install -d -o deltaserve -g deltaserve /data
COPY --from=build /opt/deltaserve /opt/deltaserve
ENV PATH=/opt/deltaserve/bin:$PATH XDG_CACHE_HOME=/opt/deltaserve/cache
USER deltaserve
WORKDIR /data
VOLUME ["/data"]
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
# A container is reachable from outside, so it wants a key file (README, "In a container").
ENTRYPOINT ["deltaserve"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000", "--store", "/data/store", "--api-keys", "/data/keys.json"]
