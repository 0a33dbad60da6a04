// The rows of the list of runs. The browser puts every value in as text, and changes only what differs.
export default {
  props: { rows: Array, head: Array, caption: String },
  emits: ["mark"],
  template: `
    <table class="runs">
      <caption class="unseen">{{ caption }}</caption>
      <thead><tr><td></td><th v-for="name in head">{{ name }}</th></tr></thead>
      <tbody>
        <tr v-for="row in rows" :key="row.path">
          <td>
            <input type="checkbox" class="switch" :id="'mark-' + row.path" :checked="row.is_marked"
              :aria-label="row.mark" @change="event => $emit('mark', [row.path, event.target.checked])">
          </td>
          <td><a class="name" :href="row.address">{{ row.name }}</a><div class="faint path">{{ row.path }}</div></td>
          <td><span :class="['badge', row.state]" :data-state="row.state">{{ row.word }}</span></td>
          <td>
            <div class="number">{{ row.steps }}</div>
            <div class="bar" v-if="row.steps"><div :style="{ width: row.percent + '%' }"></div></div>
          </td>
          <td class="number">{{ row.loss }}</td>
          <td><time class="faint">{{ row.started }}</time></td>
        </tr>
      </tbody>
    </table>`,
};
