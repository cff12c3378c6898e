"""What the target trt is made of; imported inside functions only, and knows no stage."""
