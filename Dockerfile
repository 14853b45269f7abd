# The same set-up as `make setup`; data and runs are mounted:
#   docker build -t diffusion_pl .
#   docker run --gpus all -v $PWD/data:/app/data -v $PWD/runs:/app/runs diffusion_pl make train EXP=quickstart
FROM python:3.11-slim
RUN apt-get update && apt-get install --no-install-recommends -y make git && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY diffusion_pl diffusion_pl
RUN make setup
COPY . .
CMD ["make"]
