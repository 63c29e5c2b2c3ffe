"""Images: check the URLs of a job and send the images to the model API."""
