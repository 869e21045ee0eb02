# kdflow in /opt/kdflow, which is also where its containers work. For CPUs:
#   docker build --tag kdflow .
# for NVIDIA GPUs (their driver comes from the host, by NVIDIA's container toolkit):
#   docker build --tag kdflow:cuda --build-arg DEVICE=cuda .
FROM python:3.11-bookworm

ARG DEVICE=cpu
WORKDIR /opt/kdflow
ENV PATH=/opt/kdflow/.venv/bin:$PATH

# What changes seldom comes first: without a change of the locks, this layer is there already.
COPY requirements.lock requirements-nodeps.lock requirements-cuda.lock ./
RUN python -m venv .venv && pip install --no-cache-dir --upgrade "pip==26.3" setuptools wheel \
    && if [ "$DEVICE" = cpu ]; then \
         pip install --no-cache-dir --requirement requirements.lock \
         && pip install --no-cache-dir --no-deps --requirement requirements-nodeps.lock; \
       else \
         pip install --no-cache-dir --no-deps --requirement requirements-cuda.lock; \
       fi

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . && kdflow recipes

CMD ["kdflow", "--help"]
