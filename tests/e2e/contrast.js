// Return the visible texts whose contrast is below AA: 4.5, or 3 for large text (WCAG 2.1, 1.4.3).
const numbers = (color) => color.match(/[\d.]+/g).map(Number);
const over = ([r, g, b, a = 1], [below_r, below_g, below_b]) => [r * a + below_r * (1 - a), g * a + below_g * (1 - a), b * a + below_b * (1 - a)];
const luminance = (color) => {
  const [r, g, b] = color.map((n) => (n / 255 <= 0.03928 ? n / 255 / 12.92 : ((n / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const ground = (element) => {
  const layers = [];
  for (let each = element; each; each = each.parentElement) layers.push(numbers(getComputedStyle(each).backgroundColor));
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255]);
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest(".hidden, [aria-disabled=true], a:not([href]).button, :disabled")) continue;
  const style = getComputedStyle(element);
  const below = ground(element);
  const color = over(numbers(element.closest("svg") ? style.fill : style.color), below);
  const [dark, light] = [luminance(color), luminance(below)].sort((one, other) => one - other);
  const ratio = (light + 0.05) / (dark + 0.05);
  const size = parseFloat(style.fontSize);
  const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (ratio < (isLarge ? 3 : 4.5)) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
}
return [...new Set(found)];
