{{/* Names and labels. Names leave room for the longest suffix. */}}

{{- define "ash.name" -}}
{{- $own := .Values.fullnameOverride | default (ternary .Release.Name (printf "%s-ash" .Release.Name) (contains "ash" .Release.Name)) -}}
{{- $own | trunc 45 | trimSuffix "-" -}}
{{- end }}

{{- define "ash.sandboxNamespace" -}}
{{- .Values.sandboxes.namespace | default (printf "%s-sandboxes" (include "ash.name" .)) -}}
{{- end }}

{{- define "ash.hive" -}}
{{- .Values.sandboxes.hive | default (include "ash.name" . | trunc 40 | trimSuffix "-") -}}
{{- end }}

{{- define "ash.image" -}}
{{- printf "%s:%s" .Values.image.repository .Values.image.tag -}}
{{- end }}

{{/* Of everything. */}}
{{- define "ash.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/name: ash
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Of the pods of one component; takes a list of the root and its name. */}}
{{- define "ash.selector" -}}
app.kubernetes.io/name: ash
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "ash.hasRedis" -}}
{{- if or .Values.redis.enabled .Values.redis.url .Values.redis.existingSecret.name }}true{{ end -}}
{{- end }}

{{/* A rule of a NetworkPolicy that lets out to public addresses. */}}
{{- define "ash.internet" -}}
{{- $blocked4 := list }}
{{- $blocked6 := list }}
{{- range .Values.networkPolicies.blocked }}
{{- if contains ":" . }}{{ $blocked6 = append $blocked6 . }}{{ else }}{{ $blocked4 = append $blocked4 . }}{{ end }}
{{- end }}
- to:
    - ipBlock:
        cidr: 0.0.0.0/0
        except: {{- toYaml $blocked4 | nindent 10 }}
    - ipBlock:
        cidr: ::/0
        except: {{- toYaml $blocked6 | nindent 10 }}
{{- end }}

{{/* A selector of what may speak to sandboxes and to Redis: hubs, and routers where there are some. */}}
{{- define "ash.callers" -}}
matchLabels:
  app.kubernetes.io/name: ash
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [hub{{ if .Values.router.enabled }}, router{{ end }}]}
{{- end }}
