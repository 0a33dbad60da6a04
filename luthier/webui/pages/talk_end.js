// The end of a talk. A window that shows it follows it while the page grows.
const NEAR = 40; // pixels
const page = document.documentElement;
export default {
  template: `<div></div>`,
  mounted() {
    let height = page.scrollHeight;
    this.observer = new ResizeObserver(() => {
      if (height - (window.scrollY + window.innerHeight) < NEAR) this.show();
      height = page.scrollHeight;
    });
    this.observer.observe(this.$el.parentElement);
  },
  unmounted() {
    this.observer.disconnect();
  },
  methods: {
    show() {
      window.scrollTo(0, page.scrollHeight);
    },
  },
};
