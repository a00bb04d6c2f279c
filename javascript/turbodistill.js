// AUTOMATIC1111 and Forge load this file into their page. The accordion's list gets the students that were made since,
// when the pointer comes to it: gradio filters a list that is renewed while it is open.
onUiLoaded(() => {
  for (const tab of ["txt2img", "img2img"]) {
    const part = (name) => gradioApp().querySelector(`#script_${tab}_turbodistill_${name}`);
    part("panel")?.addEventListener("mouseenter", () => {
      if (!part("panel").contains(document.activeElement)) part("fresh")?.click();
    });
  }
});
