"""What several tests share: servers, repositories, checkpoints, the documents' examples, a terminal, a browser."""
