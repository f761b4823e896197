{{/* What every pod of the chart has in common. */}}

{{- define "ash.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "ash.containerSecurity" -}}
readOnlyRootFilesystem: true
allowPrivilegeEscalation: false
capabilities: {drop: [ALL]}
{{- end }}

{{/* Where a pod goes; takes the values of its component. */}}
{{- define "ash.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "ash.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* A hub and a router write here and nowhere else. */}}
{{- define "ash.volumeMounts" -}}
- {name: state, mountPath: /var/lib/ash}
- {name: run, mountPath: /run/ash}
- {name: tmp, mountPath: /tmp}
{{- if .Values.recipes }}
- {name: recipes, mountPath: /etc/ash/recipes, readOnly: true}
{{- end }}
{{- end }}

{{- define "ash.volumes" -}}
- {name: state, emptyDir: {sizeLimit: 1Gi}}
- {name: run, emptyDir: {sizeLimit: 64Mi}}
- {name: tmp, emptyDir: {sizeLimit: 1Gi}}
{{- if .Values.recipes }}
- name: recipes
  configMap:
    name: {{ include "ash.name" . }}-recipes
    items:
      {{- range $recipe, $text := .Values.recipes }}
      - {key: {{ $recipe }}.toml, path: {{ $recipe }}/recipe.toml}
      {{- end }}
{{- end }}
{{- end }}

{{/* The hub's and the router's probes. Calls to sandboxes go on while Redis or the API server is away, so that
     readiness asks whether calls work, not whether spawns do. */}}
{{- define "ash.probes" -}}
startupProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 1
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /healthz, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  httpGet: {path: /readyz/calls, port: http}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
{{- end }}

{{/* How long calls in flight may take when a pod ends; takes its grace. The rest is for the sleep below, and for leaving. */}}
{{- define "ash.draining" -}}
- name: ASH_HUB_DRAIN_SECONDS
  value: {{ max 1 (sub (int .) 20) | quote }}
{{- end }}

{{/* Until every node has taken the pod out of its Services, new connections still come. */}}
{{- define "ash.leaving" -}}
lifecycle:
  preStop:
    exec: {command: [sleep, "5"]}
{{- end }}
