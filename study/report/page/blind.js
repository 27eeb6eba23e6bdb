// The blind choice beside the oracle's, where the study has both.

function drawBlind() {
  return false;
}
